# SPDX-License-Identifier: Apache-2.0
"""The command line: parse, call a service, print its result, map errors to exit codes.

`argparse.Namespace` stops here; nothing below knows of options or of a terminal.
"""
