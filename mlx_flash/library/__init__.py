"""Models by any name: as they lie, or converted once into our own folder."""
