"""What only the generation of token labels uses."""
