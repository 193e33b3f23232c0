"""The command line: `kunbr-fast COMMAND`, one file a command."""
