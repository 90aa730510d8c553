"""gdnfuse bench: how fast a model decodes and takes prompts on this machine, eager, under Inductor and under gdnfuse.

Each side runs in a process of its own (`workers`), is measured with `measure`, and gets no speed unless its logits are right.
benchmarks/ measures with the same.
"""
