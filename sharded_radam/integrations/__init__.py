"""Other libraries' training loops; each module needs its library, which an extra of the same name installs."""
