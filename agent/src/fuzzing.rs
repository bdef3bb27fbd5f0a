//! What `fuzz/` calls: every parser of foreign bytes in this crate, with what must hold whatever it is given.
//!
//! Each function takes any bytes. It panics when an invariant does not hold; that is the only thing a caller sees.
//! No program of keelson calls them, so they are in none.

mod files;
mod images;
mod logs;
mod pods;
mod streams;

pub use files::*;
pub use images::*;
pub use logs::*;
pub use pods::*;
pub use streams::*;

/// Text of a file or a request, as its readers take it.
fn text(input: &[u8]) -> std::borrow::Cow<'_, str> {
    String::from_utf8_lossy(input)
}

/// Steps of a script: a byte says which, another how many bytes belong to it.
struct Steps<'a>(&'a [u8]);

impl<'a> Iterator for Steps<'a> {
    type Item = (u8, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let ([step, length], rest) = self.0.split_first_chunk::<2>()?;
        let (data, rest) = rest.split_at(rest.len().min(usize::from(*length)));
        self.0 = rest;
        Some((*step, data))
    }
}
