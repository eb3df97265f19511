"""Android phones, over adb: no app is built, and nothing is left running."""
