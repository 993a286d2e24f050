"""Reading images: one robust decoder, data sets behind one interface, transforms and loaders."""
