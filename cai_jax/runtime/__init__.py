"""The foundation: devices, processes, files, progress, settings, registries and errors."""
