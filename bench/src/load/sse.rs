//! Server-sent events, as far as the feed uses them (WHATWG HTML, 9.2.6).

/// One event.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct SseEvent {
    /// Its name; empty when the stream gives none.
    pub(super) event: String,
    /// Its id.
    pub(super) id: String,
    /// Its data, lines joined by newlines.
    pub(super) data: String,
}

/// Takes the stream in pieces of any size and gives whole events.
#[derive(Debug, Default)]
pub(super) struct SseParser {
    pending: Vec<u8>,
    event: SseEvent,
    has_field: bool,
}

impl SseParser {
    /// Adds a piece of the stream.
    pub(super) fn push(&mut self, piece: &[u8]) {
        self.pending.extend_from_slice(piece);
    }

    /// The next event that is complete. Comments (keep-alives) are passed over.
    pub(super) fn next_event(&mut self) -> Option<SseEvent> {
        while let Some(end) = self.pending.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.pending.drain(..=end).collect();
            let line = String::from_utf8_lossy(&line);
            let line = line.trim_end_matches(['\n', '\r']);
            if line.is_empty() && std::mem::take(&mut self.has_field) {
                return Some(std::mem::take(&mut self.event));
            }
            self.field(line);
        }
        None
    }

    fn field(&mut self, line: &str) {
        let (name, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match name {
            "event" => value.clone_into(&mut self.event.event),
            "id" => value.clone_into(&mut self.event.id),
            "data" if self.event.data.is_empty() => value.clone_into(&mut self.event.data),
            "data" => self.event.data = format!("{}\n{value}", self.event.data),
            _ => return,
        }
        self.has_field = true;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const STREAM: &str =
        "id: 1\ndata: {\"tick\":1}\n\n:keep-alive\n\nevent: lost\r\ndata:7\r\n\r\ndata: a\ndata: b\n\nid: 9\n";

    fn event(event: &str, id: &str, data: &str) -> SseEvent {
        SseEvent { event: event.to_owned(), id: id.to_owned(), data: data.to_owned() }
    }

    proptest! {
        #[test]
        fn however_the_stream_is_cut_the_events_are_the_same(cuts in prop::collection::vec(0..STREAM.len(), 0..10)) {
            let mut cuts = cuts;
            cuts.extend([0, STREAM.len()]);
            cuts.sort_unstable();
            let mut parser = SseParser::default();
            let mut events = Vec::new();
            for pair in cuts.windows(2) {
                parser.push(&STREAM.as_bytes()[pair[0]..pair[1]]);
                while let Some(event) = parser.next_event() {
                    events.push(event);
                }
            }
            prop_assert_eq!(events, [event("", "1", "{\"tick\":1}"), event("lost", "", "7"), event("", "", "a\nb")]);
        }
    }
}
