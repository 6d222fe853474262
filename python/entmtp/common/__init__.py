"""What every part uses: errors, files, the cache, this machine."""
