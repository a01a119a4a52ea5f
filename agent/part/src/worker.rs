//! The dump worker's rules, while it holds tasks that are dumped.

/// What a dump worker is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Stop rolling back by yourself.
    Seal,
    /// Let the tasks die.
    Release,
    /// Let the tasks run on.
    Abort,
}

/// How a dump stands whose tasks are held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
pub struct Dump {
    /// It has been sealed.
    pub sealed: bool,
    /// CRIU, which holds the tasks, lives.
    pub criu_lives: bool,
    /// Its deadline has passed.
    pub late: bool,
    /// No agent is connected.
    pub abandoned: bool,
}

/// Why an unsealed dump is given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// That was the order.
    Told,
    /// CRIU was killed: the tasks run on already.
    CriuGone,
    /// The deadline has passed.
    Late,
    /// The agent is gone.
    Abandoned,
}

/// What a worker does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Seals.
    Seal,
    /// Lets the tasks die.
    Release,
    /// Lets the tasks run on.
    GiveUp(Reason),
    /// Nothing: the order is none for this dump.
    Ignore,
    /// Waits.
    Wait,
}

impl Dump {
    /// What a worker does that has this order, or none. An order comes before everything that it could do by itself.
    pub fn next(self, order: Option<Order>) -> Next {
        match order {
            Some(Order::Seal) => Next::Seal,
            Some(Order::Release) if self.sealed => Next::Release,
            Some(Order::Release) => Next::Ignore,
            Some(Order::Abort) => Next::GiveUp(Reason::Told),
            None if self.sealed => Next::Wait,
            None if !self.criu_lives => Next::GiveUp(Reason::CriuGone),
            None if self.late => Next::GiveUp(Reason::Late),
            None if self.abandoned => Next::GiveUp(Reason::Abandoned),
            None => Next::Wait,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WELL: Dump = Dump { sealed: false, criu_lives: true, late: false, abandoned: false };

    #[test]
    fn a_sealed_dump_is_given_up_on_order_alone() {
        let forsaken = Dump { sealed: true, criu_lives: false, late: true, abandoned: true };
        assert_eq!(forsaken.next(None), Next::Wait);
        assert_eq!(forsaken.next(Some(Order::Abort)), Next::GiveUp(Reason::Told));
        assert_eq!(forsaken.next(Some(Order::Release)), Next::Release);
    }

    #[test]
    fn an_unsealed_dump_is_given_up_when_anything_is_wrong_and_never_released() {
        assert_eq!(WELL.next(None), Next::Wait);
        assert_eq!(WELL.next(Some(Order::Release)), Next::Ignore);
        for (dump, reason) in [
            (Dump { criu_lives: false, ..WELL }, Reason::CriuGone),
            (Dump { late: true, ..WELL }, Reason::Late),
            (Dump { abandoned: true, ..WELL }, Reason::Abandoned),
        ] {
            assert_eq!(dump.next(None), Next::GiveUp(reason));
            assert_eq!(dump.next(Some(Order::Seal)), Next::Seal, "whether it can is seen behind the fence");
        }
    }
}
