//! A container's writable layer: packing, unpacking, mounting.
