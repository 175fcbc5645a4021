# SPDX-License-Identifier: Apache-2.0
"""Files out of a point: its disks served to the appliance, whose answers are printed or written here.

The file systems are read by the appliance's kernel. From there on names, links, sizes and modes are a
stranger's word.
"""
