import pytest
from hypothesis import given
from hypothesis import strategies as st

from concat_ensemble.reporting.licenses import OTHER, REQUIREMENTS, joint_license

MEMBERS = st.lists(st.sampled_from([*REQUIREMENTS, "seer-license", "", None]), max_size=5)


@given(MEMBERS)
def test_the_joint_licence_is_never_freer_than_a_member(members):
    joint = joint_license(members)
    assert joint == OTHER or joint in members, "a member has that licence"
    assert joint == OTHER or all(REQUIREMENTS[name] <= REQUIREMENTS[joint] for name in members)
    assert joint == OTHER or set(members) <= REQUIREMENTS.keys(), "an unknown licence may require anything"


@given(MEMBERS, st.randoms(use_true_random=False))
def test_neither_order_nor_repetition_matters(members, random):
    again = [*members, *members]
    random.shuffle(again)
    assert joint_license(again) == joint_license(members)


@given(MEMBERS, MEMBERS)
def test_a_further_member_never_makes_it_freer(members, more):
    joint, larger = joint_license(members), joint_license([*members, *more])
    assert larger == OTHER or not members or REQUIREMENTS[joint] <= REQUIREMENTS[larger]


@pytest.mark.parametrize(
    ("members", "joint"),
    [
        (["mit", "apache-2.0"], "apache-2.0"),
        (["bsd-3-clause", "cc-by-nc-4.0", "cc-by-nc-4.0"], "cc-by-nc-4.0"),
        (["bsd-2-clause", "mit"], "bsd-2-clause"),  # they require the same
        (["apache-2.0", "gpl-3.0", "lgpl-3.0"], "gpl-3.0"),
        (["gpl-3.0", "cc-by-nc-4.0"], OTHER),
        (["cc-by-sa-4.0", "cc-by-nc-4.0"], OTHER),
        (["cc-by-sa-4.0", "cc-by-nc-sa-4.0"], OTHER),
        (["apache-2.0", None], OTHER),
        (["seer-license"], OTHER),
        ([], OTHER),
    ],
)
def test_known_cases(members, joint):
    assert joint_license(members) == joint
