//! The Python module: converts arguments, releases the GIL, turns errors into
//! `ValueError`. No algorithm lives here.

use crate::{Error, Id, Pair, Trainer, GPT4_PATTERN};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::types::{PyBytes, PyIterator, PyString};

// [pyclass]
impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        PyValueError::new_err(error.to_string())
    }
}

/// A byte pair encoding tokenizer; without training it knows the 256 bytes.
#[pyclass(module = "rustbpe")]
struct Tokenizer {
    inner: crate::Tokenizer,
}
// [/pyclass]

#[pymethods]
impl Tokenizer {
    #[new]
    fn new() -> PyResult<Self> {
        let inner = crate::Tokenizer::new(Vec::new(), GPT4_PATTERN)?;
        Ok(Self { inner })
    }

    // [pytrain]
    /// Learn a vocabulary of vocab_size tokens from an iterable of strings.
    #[pyo3(signature = (iterator, vocab_size, buffer_size=8192, pattern=None))]
    fn train_from_iterator(
        &mut self,
        py: Python<'_>,
        iterator: &Bound<'_, PyAny>,
        vocab_size: usize,
        buffer_size: usize,
        pattern: Option<&str>,
    ) -> PyResult<()> {
        let pattern = pattern.unwrap_or(GPT4_PATTERN);
        let mut trainer = Trainer::new(pattern)?;
        crate::train::check(vocab_size)?;
        if buffer_size == 0 {
            return Err(PyValueError::new_err("buffer_size is 0, use 1 or more"));
        }
        let mut texts = Texts::new(iterator)?;
        loop {
            let buffer = texts.take(buffer_size)?; // needs the GIL
            if buffer.is_empty() {
                break;
            }
            py.detach(|| trainer.feed(&buffer))?; // works without it
            py.check_signals()?;
        }
        let merges = learn(py, trainer, vocab_size)?;
        self.inner = py.detach(|| crate::Tokenizer::new(merges, pattern))?;
        Ok(())
    }
    // [/pytrain]

    // [pyranks]
    /// Make a tokenizer from (bytes, rank) pairs and a split pattern.
    #[staticmethod]
    fn from_ranks(mut ranks: Vec<(Vec<u8>, Id)>, pattern: &str) -> PyResult<Self> {
        ranks.sort_by_key(|(_, rank)| *rank);
        for (i, (_, rank)) in ranks.iter().enumerate() {
            if *rank as usize != i {
                let why = format!(
                    "they must be 0, 1, 2, ... each once, but number {i} is {rank}"
                );
                return Err(Error::Ranks(why).into());
            }
        }
        let tokens = ranks.into_iter().map(|(token, _)| token.into()).collect();
        let inner = crate::Tokenizer::from_tokens(tokens, pattern)?;
        Ok(Self { inner })
    }

    /// The split pattern.
    fn get_pattern(&self) -> &str {
        self.inner.pattern()
    }

    /// All tokens as (bytes, rank), lowest rank first.
    fn get_mergeable_ranks<'py>(
        &self,
        py: Python<'py>,
    ) -> Vec<(Bound<'py, PyBytes>, usize)> {
        let tokens = self.inner.tokens().iter().enumerate();
        tokens.map(|(rank, token)| (PyBytes::new(py, token), rank)).collect()
    }

    /// The number of tokens.
    #[getter]
    fn vocab_size(&self) -> usize {
        self.inner.tokens().len()
    }
    // [/pyranks]

    // [pyencode]
    /// Encode one text.
    fn encode(&self, py: Python<'_>, text: PyBackedStr) -> PyResult<Vec<Id>> {
        Ok(py.detach(|| self.inner.encode(&text))?)
    }

    /// Encode many texts on all cores.
    fn encode_batch(
        &self,
        py: Python<'_>,
        texts: &Bound<'_, PyAny>,
    ) -> PyResult<Vec<Vec<Id>>> {
        let texts = Texts::new(texts)?.take(usize::MAX)?;
        Ok(py.detach(|| self.inner.encode_batch(&texts))?)
    }

    /// The bytes of a list of tokens.
    fn decode<'py>(
        &self,
        py: Python<'py>,
        ids: Vec<Id>,
    ) -> PyResult<Bound<'py, PyBytes>> {
        Ok(PyBytes::new(py, &self.inner.decode(&ids)?))
    }
    // [/pyencode]
}

// [learn]
/// Train without the GIL, but every 256 merges let Python look at its signals.
fn learn(py: Python<'_>, trainer: Trainer, vocab_size: usize) -> PyResult<Vec<Pair>> {
    let mut signal = Ok(());
    let merges = py.detach(|| {
        trainer.train_with(vocab_size, |merges| {
            if merges % 256 == 0 {
                signal = Python::attach(|py| py.check_signals());
            }
            signal.is_ok()
        })
    });
    signal?; // what the handler raised, for instance KeyboardInterrupt
    Ok(merges?)
}
// [/learn]

// [texts]
/// A Python iterable of strings that can say which item is not one.
struct Texts<'py> {
    items: Bound<'py, PyIterator>,
    seen: usize,
}

impl<'py> Texts<'py> {
    fn new(iterable: &Bound<'py, PyAny>) -> PyResult<Self> {
        if iterable.is_instance_of::<PyString>() {
            let why =
                "expected an iterable of strings, got one string; put it in a list";
            return Err(PyValueError::new_err(why));
        }
        let items = iterable.try_iter()?;
        Ok(Self { items, seen: 0 })
    }

    /// The next `n` strings, fewer at the end. They borrow Python's own UTF-8.
    fn take(&mut self, n: usize) -> PyResult<Vec<PyBackedStr>> {
        let mut buffer = Vec::new();
        while buffer.len() < n {
            let Some(item) = self.items.next() else { break };
            let item = item?;
            let text = item.extract().map_err(|error| {
                let kind = item.get_type();
                PyValueError::new_err(format!(
                    "item {} ({kind}) is not text: {error}",
                    self.seen
                ))
            })?;
            buffer.push(text);
            self.seen += 1;
        }
        Ok(buffer)
    }
}
// [/texts]

// [pymodule]
#[pymodule]
mod rustbpe {
    #[pymodule_export]
    use super::Tokenizer;
}
// [/pymodule]
