"""The sources of a start, such as the spectra of the pretrained weights."""
