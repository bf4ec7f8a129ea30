"""The command line: arguments in, text out. A file for each command; what they do lies in `robustkit.runs` and
`robustkit.reporting`, which are imported when a command needs them: `--help` and `list` load no torch.
"""
