# SPDX-License-Identifier: Apache-2.0
"""People are told what is wrong: once a run, not again before long, and once when it is well again.

    notices     what is wrong, from a survey
    telling     which of it is news for whom, and that it was told
    ways        mail, webhook, healthchecks, ntfy, command, Apprise

Nothing here stops a backup. A way that fails is named by the others, and by the exit code.
"""
