"""The torch-free floor: what may be asked, the state of a sequence, messages, and who goes next."""
