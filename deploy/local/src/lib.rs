//! Two nodes, a coordinator and a client side on one machine, each in its own namespaces.
