"""The commands of ``axolotl spft``, one file each."""
