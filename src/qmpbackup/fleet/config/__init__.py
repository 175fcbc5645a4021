# SPDX-License-Identifier: Apache-2.0
"""The configuration: from files to settings, with all that is wrong with them.

kinds       kinds of values, and sentences for what is none
table       the one table of all keys
files       files → tables, each of which stands once
sockets     sockets that are named after VMs
members     which VMs there are
loading     tables → settings
"""

from qmpbackup.fleet.config.loading import host_name, load

__all__ = ["host_name", "load"]
