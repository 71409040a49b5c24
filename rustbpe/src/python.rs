//! The Python module: converts arguments, releases the GIL, turns errors into
//! `ValueError`. It contains no algorithms.

use crate::{Error, Id, Pair, Trainer, GPT4_PATTERN};
use numpy::{IntoPyArray, PyArray1};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::types::{PyBytes, PyInt, PyIterator, PyList, PyString, PyType};
use std::time::{Duration, Instant};

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        PyValueError::new_err(error.to_string())
    }
}

/// A byte pair encoding tokenizer; before training it has only the 256 byte tokens.
#[pyclass(module = "rustbpe")]
struct Tokenizer {
    inner: crate::Tokenizer,
    /// One Python integer per id, so that lists of ids need not create new ones.
    ints: Vec<Py<PyInt>>,
}

impl Tokenizer {
    fn wrap(py: Python<'_>, inner: crate::Tokenizer) -> Self {
        let ints = (0..inner.tokens().len()).map(|id| PyInt::new(py, id).unbind());
        Self { ints: ints.collect(), inner }
    }

    fn list<'py>(&self, py: Python<'py>, ids: &[Id]) -> PyResult<Bound<'py, PyList>> {
        PyList::new(py, ids.iter().map(|&id| self.ints[id as usize].bind(py)))
    }
}

#[pymethods]
impl Tokenizer {
    #[new]
    fn new(py: Python<'_>) -> PyResult<Self> {
        Ok(Self::wrap(py, crate::Tokenizer::new(Vec::new(), GPT4_PATTERN)?))
    }

    /// Learn a vocabulary of vocab_size tokens from an iterable of strings.
    ///
    /// `progress`, if given, is called at intervals as progress("count", bytes read,
    /// None) and progress("merge", merges learned, merges wanted).
    #[pyo3(signature = (
        iterator, vocab_size, buffer_size=8192, pattern=None, progress=None
    ))]
    fn train_from_iterator(
        &mut self,
        py: Python<'_>,
        iterator: &Bound<'_, PyAny>,
        vocab_size: usize,
        buffer_size: usize,
        pattern: Option<&str>,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<()> {
        let pattern = pattern.unwrap_or(GPT4_PATTERN);
        let mut trainer = Trainer::new(pattern)?;
        crate::train::check(vocab_size)?;
        if buffer_size == 0 {
            return Err(PyValueError::new_err("buffer_size is 0: use 1 or more"));
        }
        let mut texts = Texts::new(iterator)?;
        loop {
            let buffer = texts.take(buffer_size, BUFFER_BYTES)?; // needs the GIL
            if buffer.is_empty() {
                break;
            }
            py.detach(|| trainer.feed(&buffer))?; // works without it
            py.check_signals()?;
            if let Some(report) = &progress {
                report.call1(py, ("count", texts.bytes, py.None()))?;
            }
        }
        let merges = learn(py, trainer, vocab_size, progress)?;
        let inner = py.detach(|| crate::Tokenizer::new(merges, pattern))?;
        *self = Self::wrap(py, inner);
        Ok(())
    }

    /// Create a tokenizer from (bytes, rank) pairs and a split pattern.
    #[staticmethod]
    fn from_ranks(
        py: Python<'_>,
        mut ranks: Vec<(Vec<u8>, Id)>,
        pattern: &str,
    ) -> PyResult<Self> {
        ranks.sort_by_key(|(_, rank)| *rank);
        for (i, (_, rank)) in ranks.iter().enumerate() {
            if *rank as usize != i {
                let why = format!(
                    "they must be 0, 1, 2, ... without gaps, but number {i} is {rank}"
                );
                return Err(Error::Ranks(why).into());
            }
        }
        let tokens = ranks.into_iter().map(|(token, _)| token.into()).collect();
        Ok(Self::wrap(py, crate::Tokenizer::from_tokens(tokens, pattern)?))
    }

    /// Return the split pattern.
    fn get_pattern(&self) -> &str {
        self.inner.pattern()
    }

    /// Return all tokens as (bytes, rank) pairs, lowest rank first.
    fn get_mergeable_ranks<'py>(
        &self,
        py: Python<'py>,
    ) -> Vec<(Bound<'py, PyBytes>, usize)> {
        let tokens = self.inner.tokens().iter().enumerate();
        tokens.map(|(rank, token)| (PyBytes::new(py, token), rank)).collect()
    }

    /// Return what `pickle` and `copy` store: type, no arguments, tokens and pattern.
    #[allow(clippy::type_complexity)]
    fn __reduce__<'py>(
        slf: &Bound<'py, Self>,
    ) -> (Bound<'py, PyType>, (), (Vec<(Bound<'py, PyBytes>, usize)>, String)) {
        let this = slf.borrow();
        let state = (this.get_mergeable_ranks(slf.py()), this.get_pattern().to_owned());
        (slf.get_type(), (), state)
    }

    /// Restore the state that `__reduce__` returned.
    fn __setstate__(
        &mut self,
        py: Python<'_>,
        state: (Vec<(Vec<u8>, Id)>, String),
    ) -> PyResult<()> {
        *self = Self::from_ranks(py, state.0, &state.1)?;
        Ok(())
    }

    /// The number of tokens.
    #[getter]
    fn vocab_size(&self) -> usize {
        self.inner.tokens().len()
    }

    /// Encode one text.
    fn encode<'py>(
        &self,
        py: Python<'py>,
        text: PyBackedStr,
    ) -> PyResult<Bound<'py, PyList>> {
        let ids = py.detach(|| self.inner.encode(&text))?;
        self.list(py, &ids)
    }

    /// Encode many texts on all cores.
    fn encode_batch<'py>(
        &self,
        py: Python<'py>,
        texts: &Bound<'_, PyAny>,
    ) -> PyResult<Vec<Bound<'py, PyList>>> {
        let texts = Texts::new(texts)?.all()?;
        let rows = py.detach(|| self.inner.encode_batch(&texts))?;
        rows.iter().map(|ids| self.list(py, ids)).collect()
    }

    /// Encode many texts on all cores into one array, without Python integers.
    ///
    /// Returns (ids, ends): the concatenated ids of all texts, as uint16 if the
    /// vocabulary has at most 65,536 tokens, else as uint32; and, as int64, where each
    /// text's ids end.
    fn encode_to_numpy<'py>(
        &self,
        py: Python<'py>,
        texts: &Bound<'py, PyAny>,
    ) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyArray1<i64>>)> {
        let texts = Texts::new(texts)?.all()?;
        let ends = |ends: Vec<usize>| {
            let ends: Vec<i64> = ends.into_iter().map(|end| end as i64).collect();
            ends.into_pyarray(py)
        };
        if self.vocab_size() <= 1 << 16 {
            // `as` loses nothing: ids are smaller than the vocabulary's size.
            let flat = py.detach(|| self.inner.encode_flat(&texts, |id| id as u16))?;
            return Ok((flat.0.into_pyarray(py).into_any(), ends(flat.1)));
        }
        let flat = py.detach(|| self.inner.encode_flat(&texts, |id| id))?;
        Ok((flat.0.into_pyarray(py).into_any(), ends(flat.1)))
    }

    /// Return the bytes of a list of tokens.
    fn decode_bytes<'py>(
        &self,
        py: Python<'py>,
        ids: Vec<Id>,
    ) -> PyResult<Bound<'py, PyBytes>> {
        Ok(PyBytes::new(py, &self.inner.decode(&ids)?))
    }

    /// Return the text of a list of tokens; errors is "strict" or "replace", as in Python.
    #[pyo3(signature = (ids, errors="strict"))]
    fn decode(&self, ids: Vec<Id>, errors: &str) -> PyResult<String> {
        let bytes = self.inner.decode(&ids)?;
        match errors {
            "strict" => Ok(String::from_utf8(bytes).map_err(Error::from)?),
            "replace" => Ok(String::from_utf8_lossy(&bytes).into_owned()),
            other => Err(PyValueError::new_err(format!(
                "errors is {other:?}: use 'strict' or 'replace'"
            ))),
        }
    }

    /// Create a decoder that takes tokens one by one and never splits a character.
    fn stream_decoder(slf: Py<Self>) -> StreamDecoder {
        StreamDecoder { tokenizer: slf, state: crate::Utf8Stream::default() }
    }
}

/// Turns tokens into whole characters as they arrive.
#[pyclass(module = "rustbpe")]
struct StreamDecoder {
    tokenizer: Py<Tokenizer>,
    state: crate::Utf8Stream,
}

#[pymethods]
impl StreamDecoder {
    /// Add one token; return the characters that it completes, possibly none.
    fn push(&mut self, py: Python<'_>, id: Id) -> PyResult<String> {
        let bytes = self.tokenizer.borrow(py).inner.decode(&[id])?;
        Ok(self.state.push(&bytes))
    }

    /// End the stream; return a replacement character for an incomplete one.
    fn finish(&mut self) -> String {
        self.state.finish()
    }
}

/// How often training, which runs without the GIL, lets Python handle signals.
const LOOK: Duration = Duration::from_millis(100);

/// Train without the GIL, but let Python handle signals at intervals.
fn learn(
    py: Python<'_>,
    trainer: Trainer,
    vocab_size: usize,
    progress: Option<Py<PyAny>>,
) -> PyResult<Vec<Pair>> {
    let mut raised = Ok(());
    let mut next = Instant::now();
    let look = |merges: usize| {
        Python::attach(|py| {
            py.check_signals()?;
            match &progress {
                Some(report) => {
                    report.call1(py, ("merge", merges, vocab_size - 256)).map(drop)
                }
                None => Ok(()),
            }
        })
    };
    let merges = py.detach(|| {
        trainer.train_with(vocab_size, |merges| {
            if Instant::now() >= next {
                raised = look(merges);
                next = Instant::now() + LOOK;
            }
            raised.is_ok()
        })
    });
    raised?; // what the handler raised, such as KeyboardInterrupt
    let merges = merges?;
    look(merges.len())?;
    Ok(merges)
}

/// A Python iterable of strings that reports which item is not a string.
struct Texts<'py> {
    items: Bound<'py, PyIterator>,
    seen: usize,
    bytes: usize,
}

/// Bytes after which a buffer is full, however few texts it holds.
const BUFFER_BYTES: usize = 16 << 20;

impl<'py> Texts<'py> {
    fn new(iterable: &Bound<'py, PyAny>) -> PyResult<Self> {
        if iterable.is_instance_of::<PyString>() {
            let why =
                "expected an iterable of strings, but got one string: put it in a list";
            return Err(PyValueError::new_err(why));
        }
        let items = iterable.try_iter()?;
        Ok(Self { items, seen: 0, bytes: 0 })
    }

    /// Return all strings, which borrow Python's own UTF-8.
    fn all(mut self) -> PyResult<Vec<PyBackedStr>> {
        self.take(usize::MAX, usize::MAX)
    }

    /// Return up to `n` strings, stopping after `bytes` bytes; none at the end.
    fn take(&mut self, n: usize, bytes: usize) -> PyResult<Vec<PyBackedStr>> {
        let mut buffer = Vec::new();
        let full = self.bytes.saturating_add(bytes);
        while buffer.len() < n && self.bytes < full {
            let Some(item) = self.items.next() else { break };
            let item = item?;
            let text: PyBackedStr = item.extract().map_err(|error| {
                let kind = item.get_type();
                PyValueError::new_err(format!(
                    "item {} ({kind}) is not a string: {error}",
                    self.seen
                ))
            })?;
            self.bytes += text.len();
            self.seen += 1;
            buffer.push(text);
        }
        Ok(buffer)
    }
}

/// Split a text into the chunks that no token may cross.
#[pyfunction]
fn split(text: &str, pattern: &str) -> PyResult<Vec<String>> {
    let mut chunks = Vec::new();
    let splitter = crate::Splitter::new(pattern)?;
    splitter.for_each(text, |chunk| chunks.push(chunk.to_owned()))?;
    Ok(chunks)
}

#[pymodule]
mod rustbpe {
    #[pymodule_export]
    use super::{split, StreamDecoder, Tokenizer};
    use pyo3::prelude::*;

    /// The patterns that have a scanner, by name.
    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("PATTERNS", std::collections::BTreeMap::from(crate::PATTERNS))
    }
}
