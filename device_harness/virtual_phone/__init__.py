"""A virtual phone: a daemon that speaks adb's protocol on loopback, without any phone."""
