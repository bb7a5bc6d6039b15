"""The commands of `compress`, in groups; importing a group registers its commands."""
