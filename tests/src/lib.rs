//! Hosts made of network namespaces, real peers, and streams that verify themselves.
