BEGIN TRANSACTION;
CREATE TABLE attempt (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        task INTEGER NOT NULL REFERENCES task ON DELETE CASCADE,
        lease TEXT NOT NULL REFERENCES lease ON DELETE CASCADE, worker INTEGER NOT NULL,
        state TEXT NOT NULL, started REAL NOT NULL, ended REAL,
        message TEXT NOT NULL DEFAULT '', log TEXT NOT NULL DEFAULT '',
        UNIQUE (task, lease)
    );
INSERT INTO "attempt" VALUES(1,1,'48691940c203c45815441c848f7366ff',1,'done',1.79537626427778339386e+09,1.79537626479984974863e+09,'','logs/ball1.png.1.txt');
INSERT INTO "attempt" VALUES(2,2,'ced093eb1513fe00fdcc723bc3c824ad',1,'done',1.79537626427823972696e+09,1.79537626561306715017e+09,'','logs/ball2.png.2.txt');
INSERT INTO "attempt" VALUES(3,3,'54637ceb1c395f4390caae0d6d9bd7e0',1,'failed',1.79537626630447745318e+09,1.79537626683361196521e+09,'File ''bad.pov'' line 1: Parse Error: Expected ''numeric expression'', End of File found instead','logs/bad.png.3.txt');
INSERT INTO "attempt" VALUES(4,4,'d1536df83c4898bc635f918e709bb89c',1,'done',1795376267.86166,1.79537626827182435988e+09,'','logs/ball1.png.4.txt');
INSERT INTO "attempt" VALUES(5,5,'6b815733f317c0c0e8cb76ffec5ebf24',1,'live',1.795376267861903429e+09,NULL,'','');
INSERT INTO "attempt" VALUES(6,6,'3ea406916fad50de410f80bbc691e417',1,'live',1.79537626786864972115e+09,NULL,'','');
INSERT INTO "attempt" VALUES(7,7,'14c58330b77faf373a87424f526c08eb',1,'live',1.79537626787722206112e+09,NULL,'','');
INSERT INTO "attempt" VALUES(8,8,'13cf88d1811b9190922d5237d8b11c9c',1,'live',1.79537626827020788187e+09,NULL,'','');
INSERT INTO "attempt" VALUES(9,9,'68d3f3d497a62ecbf472e57930d4cd6c',1,'done',1.79537626827042031286e+09,1.79537627223242592816e+09,'','logs/ball6.png.9.txt');
CREATE TABLE blob (
        sha256 TEXT PRIMARY KEY, size INTEGER NOT NULL, stored REAL NOT NULL
    ) WITHOUT ROWID;
INSERT INTO "blob" VALUES('8b60bacabb97823be5e440a885453d32a3b1709bbbe2d49e2270bb1837aef808',9,1.79537626407894039155e+09);
INSERT INTO "blob" VALUES('e29f2bebe2d8a6d3778c733d02df786453bc60f20a85d30a2a884caf795ceb6e',266,1.79537626408686232563e+09);
CREATE TABLE event (
        id INTEGER PRIMARY KEY AUTOINCREMENT, time REAL NOT NULL, job INTEGER, frame INTEGER,
        worker INTEGER, what TEXT NOT NULL, text TEXT NOT NULL
    );
INSERT INTO "event" VALUES(1,1.79537626406481862066e+09,1,NULL,NULL,'submitted','2 frames');
INSERT INTO "event" VALUES(2,1.7953762640870482921e+09,1,NULL,NULL,'job active','');
INSERT INTO "event" VALUES(3,1.79537626426304435726e+09,NULL,NULL,1,'joined','anna');
INSERT INTO "event" VALUES(4,1.795376264277990818e+09,1,1,NULL,'leased','anna');
INSERT INTO "event" VALUES(5,1.7953762642782988548e+09,1,2,NULL,'leased','anna');
INSERT INTO "event" VALUES(6,1.79537626480002808571e+09,1,1,NULL,'done','');
INSERT INTO "event" VALUES(7,1.79537626561318302154e+09,1,2,NULL,'done','');
INSERT INTO "event" VALUES(8,1.79537626561327409747e+09,1,NULL,NULL,'job done','');
INSERT INTO "event" VALUES(9,1.79537626629756498332e+09,2,NULL,NULL,'submitted','1 frames');
INSERT INTO "event" VALUES(10,1.79537626629783844947e+09,2,NULL,NULL,'job active','');
INSERT INTO "event" VALUES(11,1.79537626630462288862e+09,2,0,NULL,'leased','anna');
INSERT INTO "event" VALUES(12,1.79537626683408522605e+09,2,0,NULL,'failed','File ''bad.pov'' line 1: Parse Error: Expected ''numeric expression'', End of File found instead');
INSERT INTO "event" VALUES(13,1.79537626683416914937e+09,2,NULL,NULL,'job failed','');
INSERT INTO "event" VALUES(14,1.79537626786013174056e+09,3,NULL,NULL,'submitted','6 frames');
INSERT INTO "event" VALUES(15,1.79537626786042785642e+09,3,NULL,NULL,'job active','');
INSERT INTO "event" VALUES(16,1.79537626786174511913e+09,3,1,NULL,'leased','anna');
INSERT INTO "event" VALUES(17,1.79537626786196589465e+09,3,2,NULL,'leased','anna');
INSERT INTO "event" VALUES(18,1.79537626786879944804e+09,3,3,NULL,'leased','anna');
INSERT INTO "event" VALUES(19,1.79537626787739181518e+09,3,4,NULL,'leased','anna');
INSERT INTO "event" VALUES(20,1.79537626827028250695e+09,3,5,NULL,'leased','anna');
INSERT INTO "event" VALUES(21,1.79537626827047228812e+09,3,6,NULL,'leased','anna');
INSERT INTO "event" VALUES(22,1.79537626827189421654e+09,3,1,NULL,'done','');
INSERT INTO "event" VALUES(23,1.79537627223254704468e+09,3,6,NULL,'done','');
INSERT INTO "event" VALUES(24,1.79537627293562412258e+09,4,NULL,NULL,'submitted','3 frames');
INSERT INTO "event" VALUES(25,1.79537627293596339225e+09,4,NULL,NULL,'job active','');
INSERT INTO "event" VALUES(26,1.79537627298221015926e+09,4,NULL,NULL,'job paused','paused by hand');
INSERT INTO "event" VALUES(27,1.79537627375951051715e+09,5,NULL,NULL,'submitted','2 frames');
INSERT INTO "event" VALUES(28,1795376273.75976,5,NULL,NULL,'job active','');
INSERT INTO "event" VALUES(29,1.79537627388979601859e+09,5,NULL,NULL,'job cancelled','');
INSERT INTO "event" VALUES(30,1.79537627389023303993e+09,5,1,NULL,'cancelled','job cancelled');
INSERT INTO "event" VALUES(31,1.79537627389034676553e+09,5,2,NULL,'cancelled','job cancelled');
INSERT INTO "event" VALUES(32,1.79537627389526629442e+09,6,NULL,NULL,'submitted','1 frames');
CREATE TABLE job (
        id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL, state TEXT NOT NULL,
        reason TEXT NOT NULL DEFAULT '', owner TEXT NOT NULL, pov TEXT NOT NULL,
        manifest TEXT NOT NULL REFERENCES manifest, priority INTEGER NOT NULL,
        max_workers INTEGER NOT NULL, retry_limit INTEGER NOT NULL, in_order INTEGER NOT NULL,
        created REAL NOT NULL, started REAL, finished REAL,
        queued INTEGER NOT NULL DEFAULT 0, leased INTEGER NOT NULL DEFAULT 0,
        done INTEGER NOT NULL DEFAULT 0, failed INTEGER NOT NULL DEFAULT 0,
        cancelled INTEGER NOT NULL DEFAULT 0, cpu REAL NOT NULL DEFAULT 0,
        wall REAL NOT NULL DEFAULT 0
    );
INSERT INTO "job" VALUES(1,'first','done','','admin','{"values": {"Width": "4", "Height": "3", "Bounding_Threshold": "3", "Verbose": "On", "Output_To_File": "On", "Output_File_Type": "N", "Input_File_Name": "ball.pov", "Final_Frame": "2", "Initial_Clock": "0", "Final_Clock": "0.1"}, "declares": [], "library": ["%POVRAY%"], "run_dir": ".", "uses": []}','5742d97d2032e4be2b76a505667e87c31a46d535076280253b63840e069f8d8a',0,0,3,0,1.79537626406481862066e+09,1.79537626427778339386e+09,1.79537626561327409747e+09,0,0,2,0,0,4.80000000000000037747e-01,1.763);
INSERT INTO "job" VALUES(2,'broken','failed','','admin','{"values": {"Width": "4", "Height": "3", "Bounding_Threshold": "3", "Verbose": "On", "Output_To_File": "On", "Output_File_Type": "N", "Input_File_Name": "bad.pov"}, "declares": [], "library": ["%POVRAY%"], "run_dir": ".", "uses": []}','5742d97d2032e4be2b76a505667e87c31a46d535076280253b63840e069f8d8a',0,0,3,0,1.79537626629756498332e+09,1.79537626630447745318e+09,1.79537626683416914937e+09,0,0,0,1,0,0.0,0.0);
INSERT INTO "job" VALUES(3,'under way','active','','admin','{"values": {"Width": "4", "Height": "3", "Bounding_Threshold": "3", "Verbose": "On", "Output_To_File": "On", "Output_File_Type": "N", "Input_File_Name": "ball.pov", "Final_Frame": "6"}, "declares": [], "library": ["%POVRAY%"], "run_dir": ".", "uses": []}','5742d97d2032e4be2b76a505667e87c31a46d535076280253b63840e069f8d8a',2,0,3,0,1.79537626786013174056e+09,1795376267.86166,NULL,0,4,2,0,0,0.58,4.343);
INSERT INTO "job" VALUES(4,'resting','paused','paused by hand','admin','{"values": {"Width": "4", "Height": "3", "Bounding_Threshold": "3", "Verbose": "On", "Output_To_File": "On", "Output_File_Type": "N", "Input_File_Name": "ball.pov", "Final_Frame": "3"}, "declares": [], "library": ["%POVRAY%"], "run_dir": ".", "uses": []}','5742d97d2032e4be2b76a505667e87c31a46d535076280253b63840e069f8d8a',0,0,3,0,1.79537627293562412258e+09,NULL,NULL,3,0,0,0,0,0.0,0.0);
INSERT INTO "job" VALUES(5,'dropped','cancelled','','admin','{"values": {"Width": "4", "Height": "3", "Bounding_Threshold": "3", "Verbose": "On", "Output_To_File": "On", "Output_File_Type": "N", "Input_File_Name": "ball.pov", "Final_Frame": "2"}, "declares": [], "library": ["%POVRAY%"], "run_dir": ".", "uses": []}','5742d97d2032e4be2b76a505667e87c31a46d535076280253b63840e069f8d8a',0,0,3,0,1.79537627375951051715e+09,NULL,1.79537627388979601859e+09,0,0,0,0,2,0.0,0.0);
INSERT INTO "job" VALUES(6,'waiting','waiting','','admin','{"values": {"Input_File_Name": "late.pov", "Width": "4", "Height": "3"}, "declares": [], "library": [], "run_dir": ".", "uses": []}','dc6e696c62d9234847aa24bbdb6b8bd0fb4236f70a670d25cab7d36bd3e3e777',0,0,3,0,1.79537627389526629442e+09,NULL,NULL,1,0,0,0,0,0.0,0.0);
CREATE TABLE lease (
        id TEXT PRIMARY KEY, worker INTEGER NOT NULL REFERENCES worker,
        job INTEGER NOT NULL REFERENCES job ON DELETE CASCADE, granted REAL NOT NULL,
        ended REAL, why TEXT NOT NULL DEFAULT ''
    ) WITHOUT ROWID;
INSERT INTO "lease" VALUES('13cf88d1811b9190922d5237d8b11c9c',1,3,1.79537626827020788187e+09,NULL,'');
INSERT INTO "lease" VALUES('14c58330b77faf373a87424f526c08eb',1,3,1.79537626787722206112e+09,NULL,'');
INSERT INTO "lease" VALUES('3ea406916fad50de410f80bbc691e417',1,3,1.79537626786864972115e+09,NULL,'');
INSERT INTO "lease" VALUES('48691940c203c45815441c848f7366ff',1,1,1.79537626427778339386e+09,1.79537626479993081096e+09,'finished');
INSERT INTO "lease" VALUES('54637ceb1c395f4390caae0d6d9bd7e0',1,2,1.79537626630447745318e+09,1.79537626683365130419e+09,'finished');
INSERT INTO "lease" VALUES('68d3f3d497a62ecbf472e57930d4cd6c',1,3,1.79537626827042031286e+09,1.79537627223246312136e+09,'finished');
INSERT INTO "lease" VALUES('6b815733f317c0c0e8cb76ffec5ebf24',1,3,1.795376267861903429e+09,NULL,'');
INSERT INTO "lease" VALUES('ced093eb1513fe00fdcc723bc3c824ad',1,1,1.79537626427823972696e+09,1.79537626561310100555e+09,'finished');
INSERT INTO "lease" VALUES('d1536df83c4898bc635f918e709bb89c',1,3,1795376267.86166,1.79537626827185487748e+09,'finished');
CREATE TABLE manifest (
        key TEXT PRIMARY KEY, wire TEXT NOT NULL
    ) WITHOUT ROWID;
INSERT INTO "manifest" VALUES('5742d97d2032e4be2b76a505667e87c31a46d535076280253b63840e069f8d8a','{"files": [{"path": "bad.pov", "sha256": "8b60bacabb97823be5e440a885453d32a3b1709bbbe2d49e2270bb1837aef808", "size": 9, "mtime": 1795376262.3535092, "after_frame": null}, {"path": "ball.pov", "sha256": "e29f2bebe2d8a6d3778c733d02df786453bc60f20a85d30a2a884caf795ceb6e", "size": 266, "mtime": 1795376262.353397, "after_frame": null}]}');
INSERT INTO "manifest" VALUES('dc6e696c62d9234847aa24bbdb6b8bd0fb4236f70a670d25cab7d36bd3e3e777','{"files": [{"path": "late.pov", "sha256": "0000000000000000000000000000000000000000000000000000000000000000", "size": 5, "mtime": 1.0, "after_frame": null}]}');
CREATE TABLE manifest_blob (
        manifest TEXT NOT NULL REFERENCES manifest ON DELETE CASCADE, sha256 TEXT NOT NULL,
        PRIMARY KEY (manifest, sha256)
    ) WITHOUT ROWID;
INSERT INTO "manifest_blob" VALUES('dc6e696c62d9234847aa24bbdb6b8bd0fb4236f70a670d25cab7d36bd3e3e777','0000000000000000000000000000000000000000000000000000000000000000');
INSERT INTO "manifest_blob" VALUES('5742d97d2032e4be2b76a505667e87c31a46d535076280253b63840e069f8d8a','8b60bacabb97823be5e440a885453d32a3b1709bbbe2d49e2270bb1837aef808');
INSERT INTO "manifest_blob" VALUES('5742d97d2032e4be2b76a505667e87c31a46d535076280253b63840e069f8d8a','e29f2bebe2d8a6d3778c733d02df786453bc60f20a85d30a2a884caf795ceb6e');
CREATE TABLE meta (
        key TEXT PRIMARY KEY, value TEXT NOT NULL
    ) WITHOUT ROWID;
INSERT INTO "meta" VALUES('farm_id','2428a3f60f8cb838');
CREATE TABLE task (
        id INTEGER PRIMARY KEY AUTOINCREMENT, job INTEGER NOT NULL REFERENCES job ON DELETE CASCADE,
        frame INTEGER NOT NULL, slice INTEGER NOT NULL DEFAULT 0, name TEXT NOT NULL,
        state TEXT NOT NULL, tries INTEGER NOT NULL DEFAULT 0, worker INTEGER, finished REAL,
        sha256 TEXT, size INTEGER, cpu REAL, wall REAL, memory INTEGER,
        UNIQUE (job, frame, slice)
    );
INSERT INTO "task" VALUES(1,1,1,0,'ball1.png','done',0,1,1.79537626479975318902e+09,'ea330d36b04a0095629618e63c7bb5bf5b9671fcfd9f449d1fff9bb7c8b8ca15',307,0.02,0.47,14381056);
INSERT INTO "task" VALUES(2,1,2,0,'ball2.png','done',0,1,1.79537626561301755906e+09,'5e8e3f655f7f74609b2ba425e13c9553db23b30464ce6a5c5214db7d4467edb5',307,0.46,1.293,14811136);
INSERT INTO "task" VALUES(3,2,0,0,'bad.png','failed',1,NULL,NULL,NULL,NULL,NULL,NULL,NULL);
INSERT INTO "task" VALUES(4,3,1,0,'ball1.png','done',0,1,1.79537626827179861072e+09,'8420b0300c220d76cdeeded6b7abee05be416875cc1b9c95544a80af6e32afd9',307,0.01,0.397,14336000);
INSERT INTO "task" VALUES(5,3,2,0,'ball2.png','leased',0,NULL,NULL,NULL,NULL,NULL,NULL,NULL);
INSERT INTO "task" VALUES(6,3,3,0,'ball3.png','leased',0,NULL,NULL,NULL,NULL,NULL,NULL,NULL);
INSERT INTO "task" VALUES(7,3,4,0,'ball4.png','leased',0,NULL,NULL,NULL,NULL,NULL,NULL,NULL);
INSERT INTO "task" VALUES(8,3,5,0,'ball5.png','leased',0,NULL,NULL,NULL,NULL,NULL,NULL,NULL);
INSERT INTO "task" VALUES(9,3,6,0,'ball6.png','done',0,1,1.79537627223237943648e+09,'1554437e931d8ce2ce7740940921530e978d2032c9947689050c3e54e0d432e9',304,0.57,3.946,14561280);
INSERT INTO "task" VALUES(10,4,1,0,'ball1.png','queued',0,NULL,NULL,NULL,NULL,NULL,NULL,NULL);
INSERT INTO "task" VALUES(11,4,2,0,'ball2.png','queued',0,NULL,NULL,NULL,NULL,NULL,NULL,NULL);
INSERT INTO "task" VALUES(12,4,3,0,'ball3.png','queued',0,NULL,NULL,NULL,NULL,NULL,NULL,NULL);
INSERT INTO "task" VALUES(13,5,1,0,'ball1.png','cancelled',0,NULL,NULL,NULL,NULL,NULL,NULL,NULL);
INSERT INTO "task" VALUES(14,5,2,0,'ball2.png','cancelled',0,NULL,NULL,NULL,NULL,NULL,NULL,NULL);
INSERT INTO "task" VALUES(15,6,0,0,'late.png','queued',0,NULL,NULL,NULL,NULL,NULL,NULL,NULL);
CREATE TABLE worker (
        id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL, token TEXT NOT NULL UNIQUE,
        state TEXT NOT NULL, code TEXT NOT NULL, cores INTEGER NOT NULL, memory INTEGER NOT NULL,
        system TEXT NOT NULL, engines TEXT NOT NULL, tags TEXT NOT NULL, address TEXT NOT NULL,
        joined REAL NOT NULL
    );
INSERT INTO "worker" VALUES(1,'anna','e284b6cc8ef572796f5c055290357b967cdfa60c381dd6f638d8b53c44716bb2','admitted','TZAWJK',1,25276510208,'Linux 6.1','{"povray": "3.7.0.10.unofficial"}','[]','127.0.0.1',1.79537626426304435726e+09);
CREATE INDEX manifest_blob_sha256 ON manifest_blob (sha256);
CREATE INDEX job_state ON job (state, priority);
CREATE INDEX job_manifest ON job (manifest);
CREATE INDEX task_state ON task (job, state, frame, slice);
CREATE INDEX task_done ON task (job, finished) WHERE state = 'done';
CREATE INDEX lease_live ON lease (job) WHERE ended IS NULL;
CREATE INDEX attempt_lease ON attempt (lease);
CREATE INDEX attempt_recent ON attempt (worker, id);
CREATE INDEX attempt_live ON attempt (task) WHERE state = 'live';
CREATE INDEX attempt_failed ON attempt (worker, task) WHERE state = 'failed';
CREATE INDEX event_job ON event (job);
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('job',6);
INSERT INTO "sqlite_sequence" VALUES('task',15);
INSERT INTO "sqlite_sequence" VALUES('event',32);
INSERT INTO "sqlite_sequence" VALUES('worker',1);
INSERT INTO "sqlite_sequence" VALUES('attempt',9);
COMMIT;
PRAGMA user_version = 1;
