"""What the machine and the operating system give: cores, memory, cgroups, limits, files."""
