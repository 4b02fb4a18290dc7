"""What changes weights and judges them."""
