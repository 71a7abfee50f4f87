//! The sockmap engine: `verdict` decides for each segment that a forwarded socket receives,
//! `filter` what such a socket lets in.

mod filter;
mod verdict;
