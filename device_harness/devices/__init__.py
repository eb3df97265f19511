"""Where artifacts run: this host, an emulated processor, a phone, a Mac."""
