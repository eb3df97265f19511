"""iPhones and Macs, by coremltools and Xcode's tools; none of it has ever met an Apple device."""
