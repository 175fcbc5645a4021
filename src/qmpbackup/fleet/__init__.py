# SPDX-License-Identifier: Apache-2.0
"""Many VMs by one configuration: what it says, what is due, the run, its history, and who is told.

    settings    what the configuration says, resolved: values that everything here stands on
    records     what was done and what targets hold, as values
    config/     files → settings, with all that is wrong with them
    run/        what is due, once: a child process for each VM
    history     what was done; may be deleted at any time
    standing    how each VM is protected, judged by the newest point that its target holds
    metrics, messages    the same, for Prometheus and for people

Stands on the commands (each VM's work is a process of its own) and on what targets say; must not know
QEMU, nor kinds of targets.
"""
