"""An adapter that is learned from the phrase lists alone: LoRA on the base, by gradient descent.

Knows: PEFT, autograd, Adam. Refuses to know: the console, output folders, the order of a run.
"""
