//! Measurement: variants under the same load, with proof of the path, as a table and as samples.
