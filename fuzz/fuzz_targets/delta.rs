//! A delta of a page: any bytes, against a page that the first byte fills.
//!
//! What passes for a delta must be the only one of what it makes of the page.

#![no_main]

use libfuzzer_sys::fuzz_target;
use podferry_transfer::delta;

fuzz_target!(|input: &[u8]| {
    let Some((fill, bytes)) = input.split_first() else { return };
    let previous = [*fill; 4096];
    let mut now = previous;
    let decoded = delta::decode(&mut now, bytes);
    assert_eq!(decoded, delta::check(bytes));
    if decoded.is_ok() {
        let mut again = Vec::new();
        assert!(delta::encode(&previous, &now, &mut again));
        assert_eq!(again, bytes);
    }
});
