//! The archive that a kernel unpacks as its first file system: format "newc" (Documentation/driver-api/early-userspace/buffer-format.rst).

use std::path::Path;

/// An archive in the making.
#[derive(Debug, Default)]
pub(crate) struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    /// Adds a folder; those above it have to be there before.
    pub(crate) fn folder(&mut self, path: &str) {
        self.entry(path, 0o040_755, &[]);
    }

    /// Adds a program.
    pub(crate) fn program(&mut self, path: &str, content: &[u8]) {
        self.entry(path, 0o100_755, content);
    }

    /// Adds a file at an absolute path, with the folders above it.
    pub(crate) fn with_folders(&mut self, path: &Path, content: &[u8]) {
        let above: Vec<&Path> = path.ancestors().skip(1).collect();
        for folder in above.into_iter().rev().filter_map(inside) {
            // The kernel takes a folder that is there already for granted.
            self.folder(&folder);
        }
        if let Some(path) = inside(path) {
            self.program(&path, content);
        }
    }

    /// The whole archive.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, content: &[u8]) {
        self.entries += 1;
        let (name, size) = (path.len() + 1, content.len());
        // Inode, mode, owner, group, links, time, size, 2 x device, 2 x device of a device, name's length, checksum.
        let fields = [self.entries as usize, mode as usize, 0, 0, 1, 0, size, 0, 0, 0, 0, name, 0];
        self.bytes.extend(b"070701");
        for field in fields {
            self.bytes.extend(format!("{field:08x}").bytes());
        }
        self.bytes.extend(path.bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(content);
        self.pad();
    }

    /// Names and contents end on a multiple of four.
    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

/// A path as the archive has it: without the slash that it begins with. `None` for the root.
fn inside(path: &Path) -> Option<String> {
    let path = path.strip_prefix("/").ok()?.to_str()?;
    (!path.is_empty()).then(|| path.to_owned())
}

#[cfg(test)]
mod tests {
    use super::Archive;

    #[test]
    fn entries_are_headers_of_110_bytes_names_and_contents_padded_to_four() {
        let mut archive = Archive::default();
        archive.program("init", b"hello");
        let bytes = archive.finish();
        assert_eq!(&bytes[..6], b"070701");
        assert_eq!(&bytes[54..62], b"00000005", "the size");
        assert_eq!(&bytes[94..102], b"00000005", "the name's length, with its end");
        assert_eq!(&bytes[110..115], b"init\0");
        assert_eq!(&bytes[116..121], b"hello");
        assert_eq!(&bytes[124..130], b"070701", "the trailer");
        assert_eq!(bytes.len() % 4, 0);
    }
}
