"""Ctrl-C in the seconds that a script takes to import torch."""

import signal


def end_quietly():
    """From now on Ctrl-C ends the script at once and without a traceback, as it ends most programs.

    Called before the other imports. Once they are done, guard in runtime.py decides.
    """
    # Ctrl-C is ignored in the background of a shell script, and stays so
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
