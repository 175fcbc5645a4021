# SPDX-License-Identifier: Apache-2.0
"""What `qmprebase` and `qmprestore` do with the folder of one disk.

place     what the folder is: part of a target, or images without manifests
source    the chain that is meant, opened and verified
build     the merged image beside the full, proved
merge     commit and snapshotrebase: the three above in order
link      rebase: links and the symlink only
export    merge: a new file, the backup untouched
"""
