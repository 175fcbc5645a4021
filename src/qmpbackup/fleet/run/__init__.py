# SPDX-License-Identifier: Apache-2.0
"""What is due, once: each piece of work is a process of its own.

due         what is due, by schedules, points and what was tried before; pure
agenda      the same of a configuration, by what is known of its VMs and targets
choosing    which of it is next, within limits; pure
commands    the command lines of the work, and what their answers say; pure
orders      a piece of work as a command, when it begins
presence    whether a target is there at all
obstacles   what speaks against work before it is tried
failing     what is said of whatever goes wrong
workers     the processes
rounds      from what is due to what was done

Nothing here knows how a backup is made. A run that dies takes its children with it, in order.
"""
