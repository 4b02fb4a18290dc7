"""Fast implementations of the one operator of VOLO, outlook attention: CPU in C++, CUDA in Triton."""
