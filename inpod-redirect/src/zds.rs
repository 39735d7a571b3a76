//! zds.
