//! A container's link and address: making, cutting, joining, announcing.
