-- What \d+, \dx+ and completion show of the extension: every object, column and trigger has a comment, every name its place.
CREATE TEMP VIEW own AS
    SELECT d.classid, d.objid FROM pg_depend d JOIN pg_extension e ON e.oid = d.refobjid AND e.extname = 'kne'
    WHERE d.refclassid = 'pg_extension'::regclass AND d.deptype = 'e' AND d.classid <> 'pg_type'::regclass;
SELECT count(*) > 80 AS objects FROM own;
SELECT i.type, i.identity AS without_comment FROM own, pg_identify_object(classid, objid, 0) i
WHERE obj_description(objid, classid::regclass::name) IS NULL ORDER BY 1, 2;
SELECT a.attrelid::regclass || '.' || a.attname AS without_comment FROM own JOIN pg_class c ON classid = 'pg_class'::regclass AND objid = c.oid AND relkind = 'r'
JOIN pg_attribute a ON attrelid = c.oid AND attnum > 0 AND NOT attisdropped
WHERE col_description(attrelid, attnum) IS NULL ORDER BY 1;
SELECT tgrelid::regclass || '.' || tgname AS without_comment FROM pg_trigger t JOIN own ON classid = 'pg_class'::regclass AND objid = tgrelid
WHERE NOT tgisinternal AND obj_description(t.oid, 'pg_trigger') IS NULL ORDER BY 1;
-- comments fit a line of \dx+ and \df+
SELECT objoid, description FROM pg_description d JOIN own ON (classoid, objoid) = (classid, objid) WHERE length(description) > 160 OR description LIKE E'%\n%';
-- outside of the schema kne everything begins with kne_, so that kne_<TAB> finds it; inside nothing repeats it
SELECT oid::regprocedure FROM own JOIN pg_proc p ON classid = 'pg_proc'::regclass AND objid = p.oid
WHERE (pronamespace = 'kne'::regnamespace) = (proname LIKE 'kne\_%');
SELECT oid::regclass FROM own JOIN pg_class c ON classid = 'pg_class'::regclass AND objid = c.oid WHERE relnamespace <> 'kne'::regnamespace OR relname LIKE 'kne%';
-- every argument of a function that users call has a name
SELECT oid::regprocedure FROM own JOIN pg_proc p ON classid = 'pg_proc'::regclass AND objid = p.oid
WHERE pronargs > 0 AND (proargnames IS NULL OR '' = ANY (proargnames));
