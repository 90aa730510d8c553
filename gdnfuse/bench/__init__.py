"""gdnfuse bench: how fast a model decodes and computes prompts on this machine, eager, with Inductor and with gdnfuse.

Each side runs in its own process (`workers`) and is measured by `measure`. It gets no speed unless its logits are accurate. The
scripts in benchmarks/ use the same code.
"""
