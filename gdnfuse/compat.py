"""Every private API of torch, Triton and transformers that gdnfuse uses, each with what happens without it."""
