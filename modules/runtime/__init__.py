"""What every program needs: console, log, errors, signals, processes, exit codes.

Knows: terminals, signals, ranks. Refuses to know: models, configurations.
"""
