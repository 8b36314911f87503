"""Images: folders, data sets of a hub, torchvision's own."""
