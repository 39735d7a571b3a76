//! ipset.
