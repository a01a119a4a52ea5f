//! The request's body: frames from the queue, each given its place in the stream, at most as fast as allowed.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Buf as _;
use http_body::{Body, Frame as BodyFrame};
use tokio::sync::mpsc;
use tokio::time::{Instant, Sleep, sleep_until};

use super::{Chunk, Shared};
use crate::frame::{Encoder, Frame};
use crate::shares::Share;

/// How far a capped stream may be ahead of its rate: below the resolution of timers a cap would cost throughput.
const AHEAD: Duration = Duration::from_millis(5);

pub(crate) struct FrameBody {
    frames: mpsc::Receiver<Frame>,
    encoder: Encoder,
    shared: Arc<Shared>,
    /// When a capped stream has caught up with its rate.
    due: Instant,
    pause: Option<Pin<Box<Sleep>>>,
    /// Its part of what the node may send.
    share: Option<Share>,
}

impl FrameBody {
    pub(super) fn new(frames: mpsc::Receiver<Frame>, shared: Arc<Shared>) -> Self {
        let share = shared.options.shares.as_ref().map(|shares| shares.share_for(Arc::clone(&shared.urgent)));
        Self { frames, encoder: Encoder::default(), shared, due: Instant::now(), pause: None, share }
    }

    fn poll_pause(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if let Some(pause) = &mut self.pause {
            ready!(pause.as_mut().poll(cx));
            self.pause = None;
        }
        if let Some(share) = &mut self.share {
            ready!(share.poll_paid(cx));
        }
        Poll::Ready(())
    }

    /// Makes the next frame wait until the rate allows it.
    fn pace(&mut self, sent: usize) {
        if let Some(share) = &mut self.share {
            share.owe(sent);
        }
        let Some(cap) = self.shared.options.bandwidth_cap else { return };
        let now = Instant::now();
        let nanos = (sent as u128 * 1_000_000_000 / u128::from(cap.max(1))).try_into().unwrap_or(u64::MAX);
        self.due = self.due.max(now) + Duration::from_nanos(nanos);
        if self.due > now + AHEAD {
            self.pause = Some(Box::pin(sleep_until(self.due)));
        }
    }
}

impl Body for FrameBody {
    type Data = Chunk;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<BodyFrame<Chunk>, Infallible>>> {
        ready!(self.poll_pause(cx));
        let Some(frame) = ready!(self.frames.poll_recv(cx)) else { return Poll::Ready(None) };
        let chunk = self.encoder.encode(frame);
        self.shared.frames.fetch_add(1, Ordering::Relaxed);
        self.shared.wire_bytes.fetch_add(chunk.remaining() as u64, Ordering::Relaxed);
        self.pace(chunk.remaining());
        Poll::Ready(Some(Ok(BodyFrame::data(chunk))))
    }
}
