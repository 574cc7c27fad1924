use super::*;

fn pod(depth: u32, in_flight: u32) -> PodView {
    PodView {
        depth,
        in_flight,
        alive: true,
    }
}

fn dead(depth: u32) -> PodView {
    PodView {
        depth,
        in_flight: 0,
        alive: false,
    }
}

fn prefill(router: &mut Router, pods: &[PodView]) -> usize {
    router.route(pods, &[]).expect("somebody lives").prefill
}

/// Gives the deepest pod, then equal ones with different loads, then an overloaded deep one.
#[test]
fn prefix_takes_the_deepest_then_the_least_loaded_unless_far_too_busy() {
    let mut router = Router::new(Policy::Prefix, 0);
    assert_eq!(prefill(&mut router, &[pod(1, 0), pod(9, 3), pod(8, 0)]), 1);
    assert_eq!(prefill(&mut router, &[pod(9, 2), pod(3, 0), pod(9, 1)]), 2);
    assert_eq!(prefill(&mut router, &[pod(9, IMBALANCE_MAX), pod(3, 0)]), 0);
    assert_eq!(
        prefill(&mut router, &[pod(9, IMBALANCE_MAX + 1), pod(3, 0)]),
        1
    );
}

/// Asks with pods that nothing tells apart; they must take turns.
#[test]
fn equal_pods_take_turns() {
    for policy in [Policy::Prefix, Policy::RoundRobin, Policy::Load] {
        let mut router = Router::new(policy, 0);
        let turns: Vec<usize> = (0..6)
            .map(|_| prefill(&mut router, &[pod(0, 0); 3]))
            .collect();
        assert_eq!(turns, [0, 1, 2, 0, 1, 2], "{policy}");
    }
}

/// Kills pods in turn; no policy may choose a dead one, and with none alive there is an error.
#[test]
fn dead_pods_are_never_chosen() {
    for policy in Policy::ALL {
        let mut router = Router::new(policy, 3);
        for round in 0..50 {
            let mut pods = [pod(1, 0), pod(2, 1), pod(3, 2)];
            pods[round % 3].alive = false;
            assert_ne!(prefill(&mut router, &pods), round % 3, "{policy}");
        }
        let error = router
            .route(&[dead(1), dead(2)], &[pod(0, 0)])
            .expect_err("all dead");
        assert_eq!(error.kind(), ErrorKind::PeerLost);
        let route = router
            .route(&[pod(0, 0)], &[dead(5)])
            .expect("a prefill pod lives");
        assert_eq!(
            route,
            Route {
                prefill: 0,
                decode: None
            },
            "{policy}"
        );
    }
}

/// Load ignores depth and takes the least busy; the decode pod is chosen by the same policy.
#[test]
fn load_takes_the_least_busy_of_each_role() {
    let mut router = Router::new(Policy::Load, 0);
    let route = router.route(&[pod(9, 2), pod(0, 1)], &[pod(0, 0), pod(7, 3)]);
    assert_eq!(
        route.expect("all live"),
        Route {
            prefill: 1,
            decode: Some(0)
        }
    );
}

/// Draws twice with one seed and once with another.
#[test]
fn random_follows_its_seed_and_reaches_every_pod() {
    let draw = |seed| {
        let mut router = Router::new(Policy::Random, seed);
        (0..40)
            .map(|_| prefill(&mut router, &[pod(0, 0); 4]))
            .collect::<Vec<_>>()
    };
    assert_eq!(draw(1), draw(1));
    assert_ne!(draw(1), draw(2));
    assert!((0..4).all(|wanted| draw(1).contains(&wanted)));
}

/// Reads every name back, and one that is none.
#[test]
fn policies_are_read_by_their_names() {
    for policy in Policy::ALL {
        assert_eq!(
            policy.name().parse::<Policy>().expect("its own name"),
            policy
        );
    }
    let error = "fastest".parse::<Policy>().expect_err("no such policy");
    assert!(error.context().contains("\"fastest\""), "{error}");
}
