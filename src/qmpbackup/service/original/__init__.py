# SPDX-License-Identifier: Apache-2.0
"""What `qmprebase` and `qmprestore`, the commands of the original tool, do with the folder of one disk.

named_folder  what `--dir` means: part of a target, or images without manifests
choosing      the chain that is meant
merge         commit and snapshotrebase: merge it in place, as the target does it (`targets/folder/merging`)
link          rebase: links and the symlink only
export        merge: a new file, the backup untouched
"""
