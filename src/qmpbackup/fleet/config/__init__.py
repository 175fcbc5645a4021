# SPDX-License-Identifier: Apache-2.0
"""The configuration: from files to settings, with all that is wrong with them.

shapes      values, lists, tables, and how they are read
kinds       kinds of single values, and sentences for what is none; addresses: where things are
table       the one table of all keys
files       files → tables, each of which stands once
sockets     sockets that are named after VMs
members     which VMs there are
loading     tables → settings
checking    what may be other than somebody wants
looking     what `doctor` says of all VMs
showing     what each value is, and where it is from
pages       the table, for people and editors; toml: values as they are written
"""

from qmpbackup.fleet.config.loading import host_name, load

__all__ = ["host_name", "load"]
