//! BPE
#[cfg(feature = "python")]
#[pyo3::pymodule]
mod rustbpe {}
